"""Media: what an image file is, whether it is whole, and the pixels that a person sees in it.

The first arrow of a record: from a file's bytes to bytes that may go into a shard.
"""
