"""The nano corpus: composed utterances, instructions about them, and a small tokenizer."""
