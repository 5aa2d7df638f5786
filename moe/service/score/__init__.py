"""One pass per request: each is answered in a micro-batch."""
