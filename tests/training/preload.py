"""What the fork server of the resume tests imports once, so that each process starts fast."""

from tests.training import worker

worker.warm()
