"""The training loop: used to train the embedded models, and by recovery."""
