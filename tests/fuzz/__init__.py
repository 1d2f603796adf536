"""Hostile input to every reader of files: refused by name, or read; never a crash."""
