"""headwise on trained models that nobody here made. What is not there is skipped, saying so."""
