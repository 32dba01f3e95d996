"""From a recipe to a finished run: the stages, and the folder that remembers them."""
