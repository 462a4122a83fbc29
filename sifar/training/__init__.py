"What trains: models, optimizers, callbacks, the Learner."
