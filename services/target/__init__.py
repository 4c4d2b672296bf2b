"""Ray Serve application: the target model behind an OpenAI-compatible endpoint."""
