"""Files that appear whole or not at all, and files that are proved before they are read."""
