"""What several tests use: small models, servers, scenes, tolerances."""
