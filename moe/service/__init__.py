"""Serving: arrivals, the queue, batches, the budget of adaptation. A folder per kind of service."""
