"""Decoder layers one at a time: from disk into memory and out again, with the hidden states between them."""
