"""The two small models that ship with the package: their text, tokenizer, architecture, tasks and training recipe."""
