"""An engine of a third party whose module imports a model, as multi-tenant engines do."""
