"""The Python text of a model: where its statements stand, and edits that keep the rest."""
