"""Attention of a few tokens to all that is remembered, in one or two launches."""
