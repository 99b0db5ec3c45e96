"""Preprocessing: from the bytes of a picture or a video to the pixels that a network sees."""
