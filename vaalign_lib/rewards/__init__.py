"""Where rewards and their variances come from: trained ensembles, prompted judges, the truth."""
