"""The rules that a recipe must obey, by concern, and the check of all of them."""
