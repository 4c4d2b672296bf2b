"""The Lua that Redis runs for us: each script is one atomic step.

Keys of one script share a hash tag, so the scripts also run on a cluster.
"""

from __future__ import annotations

APPEND = """
-- KEYS stream, counter; ARGV max_records, then key and record in turn.
for i = 2, #ARGV, 2 do
  local number = redis.call('INCR', KEYS[2])
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], number .. '-0', 'k', ARGV[i], 'r', ARGV[i + 1])
end
"""
"""Records get the ids 1-0, 2-0, 3-0: offsets are then integers without holes, and lag is a subtraction."""

CLAIM = """
-- KEYS stream; ARGV group, member, vanished member. Returns the number of entries taken over.
local taken = 0
while true do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[3])
  if #pending == 0 then break end
  for _, entry in ipairs(pending) do
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'JUSTID')
    if #claimed == 0 then redis.call('XACK', KEYS[1], ARGV[1], entry[1]) end
    taken = taken + #claimed
  end
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[3])
return taken
"""
"""The member is deleted in the same step: deleting one that still has pending entries would lose them."""

_DELIVERED = """
local function delivered(stream, group)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    if fields['name'] == group then return tonumber(string.match(fields['last-delivered-id'], '^%d+')) end
  end
  return 0
end
"""

COMMIT = (
    _DELIVERED
    + """
-- KEYS stream; ARGV group, member, end. Other members' deliveries below the end stay theirs.
local last = (ARGV[3] - 1) .. '-0'
while true do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', last, 1000, ARGV[2])
  if #pending == 0 then break end
  for _, entry in ipairs(pending) do redis.call('XACK', KEYS[1], ARGV[1], entry[1]) end
end
if delivered(KEYS[1], ARGV[1]) < ARGV[3] - 1 then redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], last) end
"""
)

LAG = (
    _DELIVERED
    + """
-- KEYS stream, counter; ARGV group. Trimmed entries are not in the log any more and do not count.
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not first then return 0 end
local oldest = tonumber(string.match(first[1], '^%d+'))
local newest = tonumber(redis.call('GET', KEYS[2]))
local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
local count = pending[1]
if count > 0 and tonumber(string.match(pending[2], '^%d+')) < oldest then
  count = #redis.call('XPENDING', KEYS[1], ARGV[1], oldest .. '-0', '+', count)
end
return count + math.max(0, newest - math.max(delivered(KEYS[1], ARGV[1]), oldest - 1))
"""
)

ADVANCE = """
-- KEYS pointer, history, fence, frozen, moves, places
-- ARGV expected generation, generation, fencing token, is operator, pointer, reason, channel, history limit, place
local current = redis.call('HMGET', KEYS[1], 'generation', 'pointer')
if current[2] == ARGV[5] then return {'done', 0} end
local fence = tonumber(redis.call('GET', KEYS[3]) or '0')
if tonumber(ARGV[3]) < fence then return {'fence', fence} end
local generation = tonumber(current[1] or '0')
if generation ~= tonumber(ARGV[1]) then return {'stale', generation} end
if ARGV[4] == '0' then
  local reason = redis.call('GET', KEYS[4])
  if reason then return {'frozen', reason} end
else
  redis.call('SET', KEYS[4], ARGV[6])
end
redis.call('SET', KEYS[3], ARGV[3])
redis.call('HSET', KEYS[1], 'generation', ARGV[2], 'pointer', ARGV[5])
redis.call('LPUSH', KEYS[2], ARGV[5])
redis.call('LTRIM', KEYS[2], 0, ARGV[8] - 1)
redis.call('SADD', KEYS[6], ARGV[9])
redis.call('PUBLISH', ARGV[7], redis.call('INCR', KEYS[5]))
return {'done', 0}
"""
"""The pointer that is already there is a success: the reply to the first try was lost."""

ACKNOWLEDGE = """
-- KEYS words, heard, places; ARGV replica id, acknowledgement, place
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[3])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1] * 1000 + redis.call('TIME')[2] / 1000, ARGV[1])
"""
"""The server's clock says when a replica was heard: clocks of replicas need not agree."""

ACKNOWLEDGEMENTS = """
-- KEYS words, heard; ARGV time to live in milliseconds. Forgets the replicas that fell silent.
local now = redis.call('TIME')
local oldest = now[1] * 1000 + now[2] / 1000 - ARGV[1]
for _, replica in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. oldest)) do
  redis.call('HDEL', KEYS[1], replica)
  redis.call('ZREM', KEYS[2], replica)
end
return redis.call('HVALS', KEYS[1])
"""
