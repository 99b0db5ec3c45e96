"""Models on disk: files and folders that others open, and what is read of theirs."""
