"""Reading: texts, features and pictures of the samples of one version, by position."""
