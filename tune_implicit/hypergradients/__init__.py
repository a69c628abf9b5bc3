"""One hypergradient at one point: two models, two objectives, and nothing but torch."""
