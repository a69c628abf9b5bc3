"""What is asked of models and objectives before they are differentiated, and what is given back afterwards."""
