"""The service: ask for a size, get a model. `serve.app:app` is the Ray Serve application."""
