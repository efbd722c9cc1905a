"""The wordings of `dgemma.tasks.extraction`: how each kind of text says each of its fields, and what else it says.

Plain data. Training and held-out texts share no wording; ``{}`` is the field's value as the text writes it, names in
braces are values that the record does not have.
"""

from __future__ import annotations

Phrases = dict[tuple[str, str], tuple[str, ...]]  # (kind of text, or "any"; what is said) -> wordings


def _read(table: str) -> Phrases:
    """What follows on a line with a kind of text: what is said (a key of the record, the "opening", or something
    "beside") and its wordings, with slashes between them."""
    found: Phrases = {}
    kind = ""
    for line in table.splitlines():
        said, colon, wordings = line.partition(": ")
        if colon:
            found[kind, said] = (*found.get((kind, said), ()), *wordings.split(" / "))
        else:
            kind = line
    return found


TRAINING = _read("""\
order
opening: Thank you for your order! / Your order is confirmed. / Order confirmation. / We have received your order.
opening: Good news: your order is being packed. / This confirms your order. / Your order went through.
opening: Thanks for ordering with us.
date: It arrives on {}. / Delivery date: {}. / Expect it on {}. / You get it by {}. / Delivery on {}.
date: It will be with you on {}.
ref: Order no. {}. / Your order number is {}. / Order #{}. / Order code {}. / Please quote {}. / Number: {}.
sum: Total: {}. / You paid {}. / The total is {}. / Order total {}. / In all {}. / We charged {} in total.
who: Dear {}, / Ship to: {}. / Ordered by {}. / Recipient: {}. / It goes to {}. / Customer: {}.
bill
opening: Invoice. / Please find your invoice below. / This is your invoice. / A new invoice is ready.
opening: We send you our invoice. / Your monthly invoice has arrived. / Invoice for services.
opening: Reminder: an invoice is open.
date: Due on {}. / Please pay by {}. / Payment is due {}. / Due date: {}. / Pay until {}. / We expect payment by {}.
ref: Invoice no. {}. / Invoice number: {}. / Invoice #{}. / Reference {}. / Quote {} when you pay. / Number: {}.
sum: Amount due: {}. / Total: {}. / Please transfer {}. / The total is {}. / To pay: {}. / It comes to {} in total.
who: Dear {}, / Bill to: {}. / Customer: {}. / Issued to {}. / For {}. / Billed to {}.
visit
opening: Your appointment is booked. / Appointment reminder. / We confirm your appointment.
opening: You have a new appointment. / Your appointment has been moved. / See you soon at your appointment!
opening: A reminder of your next appointment. / Thank you for booking an appointment.
date: It is on {}. / Date: {}. / Please come on {}. / We see you on {}. / The new date is {}. / Be here on {}.
ref: Booking {}. / Booking code: {}. / Your booking number is {}. / Please quote {}. / Reference {}. / Number: {}.
sum: The fee is {}. / Fee: {}. / It costs {}. / Price: {}. / Please bring {}. / You pay {} on site.
who: Dear {}, / With Dr. {}. / You will see {}. / Your doctor is {}. / Patient: {}. / Booked for {}.
parcel
opening: Delivery note. / Your parcel is on its way. / A parcel is coming to you. / We have shipped your parcel.
opening: Your parcel left our depot. / Parcel notice. / We tried to deliver your parcel.
opening: Our driver has a parcel for you.
date: It arrives on {}. / Delivery on {}. / We come on {}. / Delivery date: {}. / Pick it up by {}. / Planned for {}.
ref: Tracking no. {}. / Tracking code {}. / Track it with {}. / Parcel {}. / Shipment {}. / Number: {}.
sum: Cash on delivery: {}. / Please pay {} to the driver. / Customs due: {}. / You pay {} at the door. / To pay: {}.
sum: It costs {}.
who: Dear {}, / Recipient: {}. / Addressed to {}. / For {}. / To: {}. / Only {} may sign for it.
job
opening: We are hiring a driver. / Job offer: baker wanted. / Now hiring: night nurse. / Join our team as a cook.
opening: Vacancy: warehouse clerk. / We are looking for a gardener. / Job opening for a welder.
opening: Become a barista with us.
date: Start: {}. / You start on {}. / Starting {}. / Apply by {}. / From {} on. / First day: {}.
ref: Job code {}. / Job no. {}. / Reference {}. / Please quote {}. / Ad {}. / Number: {}.
sum: Pay: {} per hour. / We pay {}. / You earn {} a month. / Salary: {}. / The pay is {}. / It pays {} a week.
who: Contact: {}. / Ask for {}. / Write to {}. / Your contact is {}. / Apply to {}. / {} answers your questions.
any
time: Time: {}. / At {}. / {} sharp. / Around {}. / Not before {}.
place: Address: {}. / Where: {}. / Place: {}. / Our address is {}. / At {}.
mail: E-mail: {}. / Reply to {}. / Mail us at {}. / Contact {}. / Questions to {}.
beside: Sent on {date}. / Shipping of {sum} is included. / Call {phone} for help. / Hotline: {phone}. / Regards, {first}
beside: Bring your ID. / Thank you! / Doors open at {time}. / We are at {place}. / No reply needed. / You saved {sum}.
beside: Printed {date}. / {first} says hello. / Terms apply. / Office hours start at {time}. / Have a nice day!
beside: A discount of {sum} was applied. / Phone {phone}.""")

HELD_OUT = _read("""\
order
opening: We confirm your order. / Many thanks, your order has arrived. / Here is your order confirmation.
date: Expect delivery on {}. / It should arrive by {}.
ref: The order number: {}. / Please quote order {}.
sum: Your total: {}. / The order comes to a total of {}.
who: Dear customer {}, / Ordered for {}.
bill
opening: Your invoice is ready. / Here is our invoice. / Attached you find the invoice.
date: Payment due on {}. / Please pay it until {}.
ref: The invoice number is {}. / Please quote {} with payment.
sum: The amount to pay is {}. / Please pay a total of {}.
who: Invoice to: {}. / Issued for {}.
visit
opening: This confirms your appointment. / Your next appointment is set. / Reminder: you have an appointment.
date: We expect you on {}. / The date is {}.
ref: The booking code is {}. / Please bring booking {}.
sum: The price is {}. / It costs a fee of {}.
who: Your appointment is with {}. / Patient name: {}.
parcel
opening: A parcel has been shipped to you. / Your parcel is with our driver. / Notice: a parcel is on its way.
date: Delivery is planned for {}. / It comes on {}.
ref: Your tracking code: {}. / Track parcel {}.
sum: Please pay the driver {}. / Due on delivery: {}.
who: The recipient is {}. / It is addressed to {}.
job
opening: We are looking for a teacher to join our team. / Now hiring a painter. / Job opening: waiter wanted.
date: Start date: {}. / The job starts on {}.
ref: The job code is {}. / Please quote job {}.
sum: We offer pay of {}. / The salary is {}.
who: Please contact {}. / Send it to {}.
any
time: The time is {}. / From {}.
place: The address: {}. / You find it at {}.
mail: Our e-mail is {}. / Please reply to {}.
beside: Written on {date}. / It includes {sum} for shipping. / For help call {phone}. / Yours, {first}
beside: Please keep this message. / We open at {time}. / Find us at {place}. / A saving of {sum}. / Thanks a lot!""")

KINDS = [kind for kind, said in TRAINING if said == "opening"]
