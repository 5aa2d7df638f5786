"""Language models with fine-grained experts: text, training, and the engine that decodes."""
