"""A GGUF file as a model of transformers: its configuration, its tokenizer, and a recipe for every parameter."""
