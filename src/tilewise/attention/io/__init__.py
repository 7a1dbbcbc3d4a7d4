"""How many bytes attention has to move: the model, its simulation, and the tilings of the engines."""
