"""Speed of a real SGLang server: tokens a second and time to the first token, recipe beside recipe, in one run."""
