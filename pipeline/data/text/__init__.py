"""Text: the word pieces and answers that a model knows."""
