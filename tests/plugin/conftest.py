"""The plugin's own tests belong to an environment that has the plugin."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("acme_diffa") else ["tests/*"]
