"""What is said: messages, recipes, bytes, and what both sides must compute bit for bit."""
