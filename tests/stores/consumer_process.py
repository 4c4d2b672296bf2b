"""A consumer that polls, commits nothing and waits to be killed: KIND ADDRESS NAME GROUP NUM_RECORDS."""

from __future__ import annotations

import signal
import sys

from slipstream.stores.kafka import KafkaLog
from slipstream.stores.redis import RedisLog

kind, address, name, group, num_records = sys.argv[1:]
log = KafkaLog(address, topic=name) if kind == "kafka" else RedisLog(address, namespace=name)
subscription = log.subscribe(group)
num_polled = 0
signal.alarm(60)
while num_polled < int(num_records):
    num_polled += len(subscription.poll(max_records=int(num_records) - num_polled, timeout_s=5))
signal.alarm(0)
print("polled", flush=True)
signal.pause()
