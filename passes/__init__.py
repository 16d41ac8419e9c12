"""Graph passes, one a file. Users import them from `laurel_rewrite.passes`."""
