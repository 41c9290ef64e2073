"""Published numbers, and what of ours stands beside them."""
