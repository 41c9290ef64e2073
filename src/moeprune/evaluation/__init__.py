"""What a model is worth: perplexity on held-out text and accuracy on lm-eval tasks."""
