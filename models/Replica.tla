------------------------------- MODULE Replica -------------------------------
(* The protocol of docs/spec/replica.md: members with their replicators, a database that is linearizable, commits on  *)
(* conditions whose answers get lost, and a lease by clocks of different rates. README.md says what is left out, and   *)
(* has the runs. A constant that begins with Mutant breaks the protocol: each must violate an invariant.               *)
EXTENDS Integers, Sequences, TLC

CONSTANTS
    Members,                     \* hosts
    Slow, Fast,                  \* what a member's clock gains in a unit of time, at least and at most
    Lease, Wait,                 \* of whoever serves, and without a sign of life, each by the own clock
    ChangesMax, TimeMax, TermMax, LostMax, AwayMax, RollbackMax, StopMax,   \* the bounds of a run
    MutantAnswer,                \* a lease counts from the answer, not from the request
    MutantTerm,                  \* a commit does not ask for its term and its member
    MutantUnverified,            \* a follower confirms a part in which a change is missing
    MutantWait                   \* a follower waits for the length of a lease, as if all clocks had one rate

Kinds == <<"create", "destroy", "rotate">>   \* the changes of a run, in order: a key, its end, a new KEK
Nothing == [kind |-> "nothing"]

VARIABLES
    now, rate, stopped,          \* time; the rate of each clock; how long each has stood still
    head, log, older,            \* the head; the changes in the database; an older state of both, or Nothing
    mode, term, number, have,    \* of a member: what it does; its last lease, its last change, all that it has
    until, since, settled, away, \* the end of its lease; since when the head and the database are as they are; hosts off
    sent, asked, heard, unsure,  \* commits under way; what a member awaits; its answer; a change that may be made
    acked, faults, admitted      \* acknowledged changes; how often what has failed; whether the page admits a loss now

member == <<mode, term, number, have, until, unsure>>
database == <<head, log, older>>
vars == <<now, rate, stopped, database, member, since, settled, away, sent, asked, heard, acked, faults, admitted>>

Clock(m) == (now - stopped[m]) * rate[m]
Clocks == [m \in Members |-> Clock(m)]
CanServe(m) == mode[m] = "serves" /\ m \notin away /\ Clock(m) < until[m]
IsLater(m) == term[m] > head.term \/ (term[m] = head.term /\ number[m] > head.number)
Fails(what, max) == faults[what] < max /\ faults' = [faults EXCEPT ![what] = @ + 1]
For(m, function, value) == [function EXCEPT ![m] = value]

Init ==
    /\ now = 0 /\ rate \in [Members -> {Slow, Fast}] /\ stopped = [m \in Members |-> 0]
    /\ head = [term |-> 0, member |-> "free", renewals |-> 0, number |-> 0] /\ log = <<>> /\ older = Nothing
    /\ mode = [m \in Members |-> "follows"] /\ term = [m \in Members |-> 0] /\ number = [m \in Members |-> 0]
    /\ have = [m \in Members |-> {}] /\ until = [m \in Members |-> 0] /\ unsure = [m \in Members |-> Nothing]
    /\ since = [m \in Members |-> 0] /\ settled = [m \in Members |-> 0] /\ away = {}
    /\ sent = {} /\ asked = [m \in Members |-> Nothing] /\ heard = [m \in Members |-> Nothing]
    /\ acked = {} /\ faults = [lost |-> 0, away |-> 0, rollback |-> 0, stop |-> 0] /\ admitted = FALSE

(* ---- Time ---- *)

Tick ==
    /\ now < TimeMax /\ now' = now + 1
    /\ UNCHANGED <<rate, stopped, database, member, since, settled, away, sent, asked, heard, acked, faults, admitted>>

(* The machine of one member stands still and its clock with it, while time goes on.                                   *)
Stop(m) ==
    /\ now < TimeMax /\ now' = now + 1 /\ Fails("stop", StopMax) /\ stopped' = For(m, stopped, stopped[m] + 1)
    /\ UNCHANGED <<rate, database, member, since, settled, away, sent, asked, heard, acked, admitted>>

(* ---- Requests: the replicator notes the time, then commits ---- *)

Ask(m, kind, change) ==
    LET request == [kind |-> kind, from |-> m, term |-> term[m], base |-> number[m], change |-> change,
                    at |-> Clock(m), saw |-> <<head.term, head.renewals>>] IN
    /\ asked[m] = Nothing /\ m \notin away
    /\ asked' = For(m, asked, request) /\ sent' = sent \cup {request}
    /\ UNCHANGED <<now, rate, stopped, database, member, since, settled, away, heard, acked, faults, admitted>>

Renew(m) == CanServe(m) /\ (until[m] < Clock(m) + Lease \/ unsure[m] # Nothing) /\ Ask(m, "renew", Nothing)

(* A change whose outcome is unknown is made again with the same content.                                              *)
Change(m) ==
    /\ CanServe(m) /\ number[m] < ChangesMax
    /\ Ask(m, "change", IF unsure[m] # Nothing THEN unsure[m] ELSE [kind |-> Kinds[number[m] + 1], by |-> m])

(* All others that are there report within the time of the wait, and one of a later change forbids it.                 *)
WaitOf == IF MutantWait THEN Lease ELSE Wait
TakeOver(m) ==
    /\ mode[m] = "follows" /\ head.term < TermMax
    /\ number[m] = head.number /\ ~IsLater(m)
    /\ head.member = "free" \/ Clock(m) - since[m] > WaitOf
        \/ (head.member = m /\ head.term = term[m])   \* its daemon was started again
    /\ faults.rollback = 0 \/ Clock(m) - settled[m] > WaitOf
    /\ \A other \in Members \ ({m} \cup away) : ~IsLater(other)
    /\ Ask(m, "serve", Nothing)

(* ---- The database takes a commit on its condition, at any time after it was sent, or never ---- *)

Holds(request) ==
    IF request.kind = "serve" THEN request.saw = <<head.term, head.renewals>>
    ELSE /\ MutantTerm \/ (head.term = request.term /\ head.member = request.from)
         /\ head.number \in (IF request.kind = "renew" THEN {request.base, request.base + 1} ELSE {request.base})

(* What nobody awaits and what can't change anything any more is left out of the state.                                *)
IsAwaited(request) == asked[request.from] = request
MayHold(request, next) ==
    \/ request.kind = "serve" /\ request.saw = <<next.term, next.renewals>>
    \/ request.kind = "change" /\ (MutantTerm \/ request.term = next.term) /\ request.base >= next.number

Take(request) ==
    LET next == [term |-> IF request.kind = "serve" THEN head.term + 1 ELSE head.term,
                 member |-> IF request.kind = "serve" THEN request.from ELSE head.member,
                 renewals |-> head.renewals + 1,
                 number |-> IF request.kind = "change" THEN head.number + 1 ELSE head.number] IN
    /\ request \in sent
    /\ IF Holds(request)
        THEN /\ head' = next /\ log' = IF request.kind = "change" THEN Append(log, request.change) ELSE log
             /\ admitted' = (admitted \/ (request.kind = "serve" /\ \E other \in away : IsLater(other)))
        ELSE UNCHANGED <<head, log, admitted>>
    /\ sent' = {other \in sent \ {request} : IsAwaited(other) \/ MayHold(other, head')}
    /\ since' = IF Holds(request) THEN Clocks ELSE since
    /\ heard' = IF IsAwaited(request)
                THEN For(request.from, heard, [kind |-> IF Holds(request) THEN "granted" ELSE "refused",
                                               term |-> head'.term, number |-> head'.number])
                ELSE heard
    /\ UNCHANGED <<now, rate, stopped, older, member, settled, away, asked, acked, faults>>

(* The answer is lost, or the request: it may be taken later, or never. What it would change is unsure.                *)
Lose(m) ==
    /\ asked[m] # Nothing /\ Fails("lost", LostMax)
    /\ unsure' = IF asked[m].kind = "change" THEN For(m, unsure, asked[m].change) ELSE unsure
    /\ asked' = For(m, asked, Nothing) /\ heard' = For(m, heard, Nothing)
    /\ UNCHANGED <<now, rate, stopped, database, mode, term, number, have, until, since, settled, away, sent, acked,
                   admitted>>

(* ---- Answers reach the daemon ---- *)

Hear(m) ==
    LET request == asked[m]
        begin == IF MutantAnswer THEN Clock(m) ELSE request.at
        in_time == IF request.kind = "serve" THEN Clock(m) < request.at + Lease ELSE CanServe(m)
        change == IF request.kind = "change" THEN request.change ELSE unsure[m]
        is_made == heard[m].number = request.base + 1 IN
    /\ heard[m] # Nothing
    /\ asked' = For(m, asked, Nothing) /\ heard' = For(m, heard, Nothing)
    /\ IF heard[m].kind = "granted" /\ in_time
        THEN /\ mode' = For(m, mode, "serves") /\ term' = For(m, term, heard[m].term)
             /\ until' = For(m, until, begin + Lease) /\ number' = For(m, number, heard[m].number)
             /\ have' = IF is_made THEN For(m, have, have[m] \cup {change}) ELSE have
             /\ acked' = IF is_made THEN acked \cup {change} ELSE acked
             /\ unsure' = IF is_made THEN For(m, unsure, Nothing) ELSE unsure
        ELSE /\ UNCHANGED <<term, number, have, acked>>
             /\ IF request.kind = "change" /\ CanServe(m)   \* the next renewal tells why
                THEN unsure' = For(m, unsure, change) /\ UNCHANGED <<mode, until>>
                ELSE mode' = For(m, mode, "follows") /\ until' = For(m, until, 0) /\ unsure' = For(m, unsure, Nothing)
    /\ UNCHANGED <<now, rate, stopped, database, since, settled, away, sent, faults, admitted>>

(* ---- Followers ---- *)

StandBy(m) ==
    /\ mode[m] = "serves" /\ ~CanServe(m) /\ m \notin away
    /\ mode' = For(m, mode, "follows") /\ asked' = For(m, asked, Nothing) /\ heard' = For(m, heard, Nothing)
    /\ unsure' = For(m, unsure, Nothing)
    /\ UNCHANGED <<now, rate, stopped, database, term, number, have, until, since, settled, away, sent, acked,
                   faults, admitted>>

(* An operator has promoted another member, or this one is sealed: it serves no more, and then the head is released.   *)
Release(m) ==
    /\ CanServe(m) /\ asked[m] = Nothing /\ head.term = term[m] /\ head.member = m
    /\ mode' = For(m, mode, "follows") /\ until' = For(m, until, 0) /\ unsure' = For(m, unsure, Nothing)
    /\ head' = [head EXCEPT !.member = "free", !.renewals = @ + 1]
    /\ since' = Clocks
    /\ UNCHANGED <<now, rate, stopped, log, older, term, number, have, settled, away, sent, asked, heard, acked, faults,
                   admitted>>

(* The sum of a state shows a part in which a change is missing; then nothing is confirmed.                            *)
Follow(m) ==
    /\ mode[m] = "follows" /\ m \notin away /\ asked[m] = Nothing /\ ~IsLater(m) /\ number[m] < head.number
    /\ \E missing \in (IF MutantUnverified THEN 0..1 ELSE {0}) :
        have' = For(m, have, {log[n] : n \in 1..(Len(log) - missing)} \cup have[m])
    /\ number' = For(m, number, head.number)
    /\ UNCHANGED <<now, rate, stopped, database, mode, term, until, unsure, since, settled, away, sent, asked, heard,
                   acked, faults, admitted>>

(* ---- Faults ---- *)

Leave(m) ==
    /\ m \notin away /\ Fails("away", AwayMax) /\ away' = away \cup {m}
    /\ mode' = For(m, mode, "follows") /\ until' = For(m, until, 0) /\ unsure' = For(m, unsure, Nothing)
    /\ asked' = For(m, asked, Nothing) /\ heard' = For(m, heard, Nothing)
    /\ UNCHANGED <<now, rate, stopped, database, term, number, have, since, settled, sent, acked, admitted>>

Return(m) ==
    /\ m \in away /\ away' = away \ {m} /\ since' = For(m, since, Clock(m)) /\ settled' = For(m, settled, Clock(m))
    /\ UNCHANGED <<now, rate, stopped, database, member, sent, asked, heard, acked, faults, admitted>>

Remember ==
    /\ RollbackMax > 0 /\ older = Nothing /\ older' = [kind |-> "state", head |-> head, log |-> log]
    /\ UNCHANGED <<now, rate, stopped, head, log, member, since, settled, away, sent, asked, heard, acked, faults,
                   admitted>>

(* An older state is restored. All connections end, so the time for which a node has confirmed reports begins anew.    *)
Rollback ==
    /\ older # Nothing /\ Fails("rollback", RollbackMax) /\ head' = older.head /\ log' = older.log
    /\ since' = Clocks /\ settled' = Clocks /\ sent' = {}
    /\ UNCHANGED <<now, rate, stopped, older, member, away, asked, heard, acked, admitted>>

Next ==
    \/ Tick \/ Remember \/ Rollback \/ \E request \in sent : Take(request)
    \/ \E m \in Members : \/ Stop(m) \/ Renew(m) \/ Change(m) \/ TakeOver(m) \/ Lose(m) \/ Hear(m) \/ StandBy(m)
                          \/ Release(m) \/ Follow(m) \/ Leave(m) \/ Return(m)

Same == Permutations(Members)
Spec == Init /\ [][Next]_vars

(* ---- Invariants ---- *)

(* No two members serve at one time.                                                                                   *)
OneServes == \A one, other \in Members : CanServe(one) /\ CanServe(other) => one = other

(* An acknowledged change is in the database, as long as nobody has restored an older one.                             *)
Durable == faults.rollback = 0 => \A change \in acked : \E n \in 1..Len(log) : log[n] = change

(* Whoever serves has every acknowledged change, also a rotation, or the page admits the loss: see README.md.          *)
Kept == \A m \in Members : CanServe(m) => acked \subseteq have[m] \/ admitted

(* A destroyed key opens nowhere after its answer.                                                                     *)
StaysDestroyed ==
    (\E change \in acked : change.kind = "destroy") /\ ~admitted =>
        \A m \in Members : CanServe(m) => \E change \in have[m] : change.kind = "destroy"
==============================================================================
