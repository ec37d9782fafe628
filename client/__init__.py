"""Who learns: the only room that loads the model and reads private text."""
