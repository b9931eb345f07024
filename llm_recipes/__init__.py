"""The importable part of LLM Recipes: one job a module, used by the scripts in recipes/ and eval/."""
