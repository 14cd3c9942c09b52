"""Text to ids and back: a word-level and a byte-level BPE tokenizer behind one interface."""
