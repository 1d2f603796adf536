"""What is learnt from views."""
