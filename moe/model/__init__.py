"""The Mixture-of-Experts transformer: routing, experts, losses, and what it does on several devices."""
