"""What policies with evidence of their own collect while sequences run."""

from serve.kv.observers.query_window import QueryWindow as QueryWindow
