"""The image's own package is found where the image has it: on PYTHONPATH."""

import sys

from tests.deploy.rendered import IMAGE_PACKAGES

sys.path.insert(0, str(IMAGE_PACKAGES))
