"""The only place where models are found, checked, loaded, merged and saved."""
