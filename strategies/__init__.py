"""How updates merge: pure tensor maths, updates in, next state out."""
