"""What Redis does in one step: Lua, each script told what it reads and writes. A moment is milliseconds since the
epoch, by Redis's own clock unless the caller brings one.

Keys, of which each may vanish at any moment: ``sent:{queue}`` and ``running:{queue}`` (tasks by the moment their lease
ends), ``paused:{queue}`` (tasks by the moment they may be sent again), ``holders:{queue}`` (who runs a task),
``running-of:{tenant}/{job}``, ``workers:{queue}`` (by the moment they count as gone), ``turns:{queue}`` (tenants with
something due, by how much they have had) and ``turns:{queue}:{tenant}`` (their jobs, the next one first),
``had:{queue}`` and ``now:{queue}`` (the same of tenants that have nothing due, and of the one served last), ``look``
(jobs by the moment they are to be planned again), ``leader:sweep`` (who leads, by the moment that ends).
"""

from __future__ import annotations

_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local clock = redis.call('TIME')
  now = clock[1] * 1000 + math.floor(clock[2] / 1000)
end
local function lasts(key, task)
  local ends = redis.call('ZSCORE', key, task)
  return ends and tonumber(ends) > now
end
"""

RESERVE = (  # KEYS sent, running, paused; ARGV now, milliseconds, task…: {place of the reserved or 0, how many free}
    _NOW
    + """
local place, free = 0, 0
for n = 3, #ARGV do
  if not lasts(KEYS[1], ARGV[n]) and not lasts(KEYS[2], ARGV[n]) and not lasts(KEYS[3], ARGV[n]) then
    free = free + 1
    if place == 0 then
      redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[n])
      place = n - 2
    end
  end
end
return {place, free}
"""
)

TAKE = (  # KEYS sent, running, holders, running-of; ARGV now, milliseconds, task, token: whether it is the token's now
    _NOW
    + """
local holder = redis.call('HGET', KEYS[3], ARGV[3])
if holder and holder ~= ARGV[4] and lasts(KEYS[2], ARGV[3]) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[3])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('ZADD', KEYS[4], now + ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[4], 86400)
return 1
"""
)

RELEASE = (  # KEYS as TAKE; ARGV now, task, token ('' of a task that was only sent)
    _NOW
    + """
if ARGV[3] == '' then return redis.call('ZREM', KEYS[1], ARGV[2]) end
if redis.call('HGET', KEYS[3], ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[4], ARGV[2])
return 1
"""
)

EXPIRED = (  # ARGV now, queue…: tasks whose lease or pause has run out, forgotten from here on
    _NOW
    + """
local found = {}
for n = 2, #ARGV do
  for _, kind in ipairs({'sent:', 'running:', 'paused:'}) do
    local key = kind .. ARGV[n]
    for _, task in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now)) do
      redis.call('ZREM', key, task)
      if kind == 'running:' then redis.call('HDEL', 'holders:' .. ARGV[n], task) end
      table.insert(found, task)
    end
  end
end
return found
"""
)

ROOMS = (  # ARGV now, then queue and depth of each: how many more tasks it takes; none where nobody has anything due
    _NOW
    + """
local found = {}
for n = 2, #ARGV, 2 do
  local queue, room = ARGV[n], 0
  if redis.call('EXISTS', 'turns:' .. queue) == 1 then
    local function count(kind) return redis.call('ZCOUNT', kind .. queue, '(' .. now, '+inf') end
    local running = count('running:')
    local waiting = math.max(count('sent:'), redis.call('LLEN', queue))
    room = math.max(1, ARGV[n + 1] * count('workers:')) - running - waiting
  end
  table.insert(found, room)
end
return found
"""
)

COUNT = (  # KEYS any sorted sets; ARGV now: how many members of each are beyond now
    _NOW
    + """
local found = {}
for n, key in ipairs(KEYS) do found[n] = redis.call('ZCOUNT', key, '(' .. now, '+inf') end
return found
"""
)

BEYOND = (  # KEYS a sorted set; ARGV now: its members beyond now
    _NOW
    + """
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')
"""
)

UNTIL = (  # KEYS a sorted set; ARGV now, milliseconds, member: the member lasts for so long
    _NOW
    + """
return redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
"""
)

LATE = (  # KEYS a sorted set; ARGV now: members whose moment has come, the latest first
    _NOW
    + """
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
"""
)

LEAD = (  # KEYS the leader; ARGV now, milliseconds, token: whether the token leads for so long
    _NOW
    + """
local leader = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
if leader and leader ~= ARGV[3] and lasts(KEYS[1], leader) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
return 1
"""
)

OFFER = (  # ARGV tenant, job, its place among the tenant's jobs, then queue and 1 (due) or 0 of each queue
    """
local tenant, job = ARGV[1], ARGV[2]
for n = 4, #ARGV, 2 do
  local queue = ARGV[n]
  local tenants, jobs = 'turns:' .. queue, 'turns:' .. queue .. ':' .. tenant
  if ARGV[n + 1] == '1' then
    redis.call('ZADD', jobs, ARGV[3], job)
    if not redis.call('ZSCORE', tenants, tenant) then
      local had = tonumber(redis.call('HGET', 'had:' .. queue, tenant) or 0)
      local least = tonumber(redis.call('GET', 'now:' .. queue) or 0)
      redis.call('ZADD', tenants, math.max(had, least), tenant)
    end
  else
    redis.call('ZREM', jobs, job)
    if redis.call('ZCARD', jobs) == 0 then redis.call('ZREM', tenants, tenant) end
  end
end
"""
)

NEXT = (  # ARGV queue: {tenant, job} whose turn it is, or nothing
    """
while true do
  local tenant = redis.call('ZRANGE', 'turns:' .. ARGV[1], 0, 0)[1]
  if not tenant then return {} end
  local job = redis.call('ZRANGE', 'turns:' .. ARGV[1] .. ':' .. tenant, 0, 0)[1]
  if job then return {tenant, job} end
  redis.call('ZREM', 'turns:' .. ARGV[1], tenant)
end
"""
)

CORRECT = (  # ARGV queue, tenant, how much more it cost than it was charged
    """
local tenants, had = 'turns:' .. ARGV[1], 'had:' .. ARGV[1]
local now = redis.call('ZSCORE', tenants, ARGV[2]) or redis.call('HGET', had, ARGV[2])
if not now then return end
redis.call('HSET', had, ARGV[2], now + ARGV[3])
if redis.call('ZSCORE', tenants, ARGV[2]) then redis.call('ZADD', tenants, now + ARGV[3], ARGV[2]) end
"""
)

CHARGE = (  # ARGV queue, tenant, cost
    """
local tenants, had = 'turns:' .. ARGV[1], 'had:' .. ARGV[1]
local before = tonumber(redis.call('ZSCORE', tenants, ARGV[2]) or redis.call('HGET', had, ARGV[2]) or 0)
redis.call('SET', 'now:' .. ARGV[1], before)
redis.call('HSET', had, ARGV[2], before + ARGV[3])
if redis.call('ZSCORE', tenants, ARGV[2]) then redis.call('ZADD', tenants, before + ARGV[3], ARGV[2]) end
"""
)
