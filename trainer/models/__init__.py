"""Encoders and heads, and weights of elsewhere put into them."""
