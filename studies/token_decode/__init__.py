"""One fine-grained Mixture-of-Experts language model: quality and joules of token decoding, together."""
