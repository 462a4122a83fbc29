"A run as files for others: learner, predictions, Space."
