"""Device operations of Slipstream; `reference` holds the plain-torch definition of each."""
