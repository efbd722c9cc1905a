"""The wordings of `dgemma.tasks.extraction`: how each kind of text says each of its fields, and what else it says.

Plain data. Training and held-out texts share no wording; ``{}`` is the field's value as the text writes it, names in
braces are values that the record does not have.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrases(NamedTuple):
    training: tuple[str, ...]
    held_out: tuple[str, ...]


OPENINGS: dict[str, Phrases] = {
    "order": Phrases(
        ("Thank you for your order!", "Your order is confirmed.", "Order confirmation.", "We have received your order.",
         "Good news: your order is being packed.", "This confirms your order.", "Your order went through.",
         "Thanks for ordering with us."),
        ("We confirm your order.", "Many thanks, your order has arrived.", "Here is your order confirmation.")),
    "bill": Phrases(
        ("Invoice.", "Please find your invoice below.", "This is your invoice.", "A new invoice is ready.",
         "We send you our invoice.", "Your monthly invoice has arrived.", "Invoice for services.",
         "Reminder: an invoice is open."),
        ("Your invoice is ready.", "Here is our invoice.", "Attached you find the invoice.")),
    "visit": Phrases(
        ("Your appointment is booked.", "Appointment reminder.", "We confirm your appointment.",
         "You have a new appointment.", "Your appointment has been moved.", "See you soon at your appointment!",
         "A reminder of your next appointment.", "Thank you for booking an appointment."),
        ("This confirms your appointment.", "Your next appointment is set.", "Reminder: you have an appointment.")),
    "parcel": Phrases(
        ("Delivery note.", "Your parcel is on its way.", "A parcel is coming to you.", "We have shipped your parcel.",
         "Your parcel left our depot.", "Parcel notice.", "We tried to deliver your parcel.",
         "Our driver has a parcel for you."),
        ("A parcel has been shipped to you.", "Your parcel is with our driver.", "Notice: a parcel is on its way.")),
    "job": Phrases(
        ("We are hiring a driver.", "Job offer: baker wanted.", "Now hiring: night nurse.", "Join our team as a cook.",
         "Vacancy: warehouse clerk.", "We are looking for a gardener.", "Job opening for a welder.",
         "Become a barista with us."),
        ("We are looking for a teacher to join our team.", "Now hiring a painter.", "Job opening: waiter wanted.")),
}

FIELDS: dict[str, dict[str, Phrases]] = {
    "order": {
        "date": Phrases(
            ("It arrives on {}.", "Delivery date: {}.", "Expect it on {}.", "You get it by {}.", "Delivery on {}.",
             "It will be with you on {}."),
            ("Expect delivery on {}.", "It should arrive by {}.")),
        "ref": Phrases(
            ("Order no. {}.", "Your order number is {}.", "Order #{}.", "Order code {}.", "Please quote {}.",
             "Number: {}."),
            ("The order number: {}.", "Please quote order {}.")),
        "sum": Phrases(
            ("Total: {}.", "You paid {}.", "The total is {}.", "Order total {}.", "In all {}.",
             "We charged {} in total."),
            ("Your total: {}.", "The order comes to a total of {}.")),
        "who": Phrases(
            ("Dear {},", "Ship to: {}.", "Ordered by {}.", "Recipient: {}.", "It goes to {}.", "Customer: {}."),
            ("Dear customer {},", "Ordered for {}.")),
    },
    "bill": {
        "date": Phrases(
            ("Due on {}.", "Please pay by {}.", "Payment is due {}.", "Due date: {}.", "Pay until {}.",
             "We expect payment by {}."),
            ("Payment due on {}.", "Please pay it until {}.")),
        "ref": Phrases(
            ("Invoice no. {}.", "Invoice number: {}.", "Invoice #{}.", "Reference {}.", "Quote {} when you pay.",
             "Number: {}."),
            ("The invoice number is {}.", "Please quote {} with payment.")),
        "sum": Phrases(
            ("Amount due: {}.", "Total: {}.", "Please transfer {}.", "The total is {}.", "To pay: {}.",
             "It comes to {} in total."),
            ("The amount to pay is {}.", "Please pay a total of {}.")),
        "who": Phrases(
            ("Dear {},", "Bill to: {}.", "Customer: {}.", "Issued to {}.", "For {}.", "Billed to {}."),
            ("Invoice to: {}.", "Issued for {}.")),
    },
    "visit": {
        "date": Phrases(
            ("It is on {}.", "Date: {}.", "Please come on {}.", "We see you on {}.", "The new date is {}.",
             "Be here on {}."),
            ("We expect you on {}.", "The date is {}.")),
        "ref": Phrases(
            ("Booking {}.", "Booking code: {}.", "Your booking number is {}.", "Please quote {}.", "Reference {}.",
             "Number: {}."),
            ("The booking code is {}.", "Please bring booking {}.")),
        "sum": Phrases(
            ("The fee is {}.", "Fee: {}.", "It costs {}.", "Price: {}.", "Please bring {}.", "You pay {} on site."),
            ("The price is {}.", "It costs a fee of {}.")),
        "who": Phrases(
            ("Dear {},", "With Dr. {}.", "You will see {}.", "Your doctor is {}.", "Patient: {}.", "Booked for {}."),
            ("Your appointment is with {}.", "Patient name: {}.")),
    },
    "parcel": {
        "date": Phrases(
            ("It arrives on {}.", "Delivery on {}.", "We come on {}.", "Delivery date: {}.", "Pick it up by {}.",
             "Planned for {}."),
            ("Delivery is planned for {}.", "It comes on {}.")),
        "ref": Phrases(
            ("Tracking no. {}.", "Tracking code {}.", "Track it with {}.", "Parcel {}.", "Shipment {}.", "Number: {}."),
            ("Your tracking code: {}.", "Track parcel {}.")),
        "sum": Phrases(
            ("Cash on delivery: {}.", "Please pay {} to the driver.", "Customs due: {}.", "You pay {} at the door.",
             "To pay: {}.", "It costs {}."),
            ("Please pay the driver {}.", "Due on delivery: {}.")),
        "who": Phrases(
            ("Dear {},", "Recipient: {}.", "Addressed to {}.", "For {}.", "To: {}.", "Only {} may sign for it."),
            ("The recipient is {}.", "It is addressed to {}.")),
    },
    "job": {
        "date": Phrases(
            ("Start: {}.", "You start on {}.", "Starting {}.", "Apply by {}.", "From {} on.", "First day: {}."),
            ("Start date: {}.", "The job starts on {}.")),
        "ref": Phrases(
            ("Job code {}.", "Job no. {}.", "Reference {}.", "Please quote {}.", "Ad {}.", "Number: {}."),
            ("The job code is {}.", "Please quote job {}.")),
        "sum": Phrases(
            ("Pay: {} per hour.", "We pay {}.", "You earn {} a month.", "Salary: {}.", "The pay is {}.",
             "It pays {} a week."),
            ("We offer pay of {}.", "The salary is {}.")),
        "who": Phrases(
            ("Contact: {}.", "Ask for {}.", "Write to {}.", "Your contact is {}.", "Apply to {}.",
             "{} answers your questions."),
            ("Please contact {}.", "Send it to {}.")),
    },
}

# Every kind of text says these alike.
EXTRA: dict[str, Phrases] = {
    "time": Phrases(("Time: {}.", "At {}.", "{} sharp.", "Around {}.", "Not before {}."),
                    ("The time is {}.", "From {}.")),
    "place": Phrases(("Address: {}.", "Where: {}.", "Place: {}.", "Our address is {}.", "At {}."),
                     ("The address: {}.", "You find it at {}.")),
    "mail": Phrases(("E-mail: {}.", "Reply to {}.", "Mail us at {}.", "Contact {}.", "Questions to {}."),
                    ("Our e-mail is {}.", "Please reply to {}.")),
}

DISTRACTORS = Phrases(
    ("Sent on {date}.", "Shipping of {sum} is included.", "Call {phone} for help.", "Hotline: {phone}.",
     "Regards, {first}", "Bring your ID.", "Thank you!", "Doors open at {time}.", "We are at {place}.",
     "No reply needed.", "You saved {sum}.", "Printed {date}.", "{first} says hello.", "Terms apply.",
     "Office hours start at {time}.", "Have a nice day!", "A discount of {sum} was applied.", "Phone {phone}."),
    ("Written on {date}.", "It includes {sum} for shipping.", "For help call {phone}.", "Yours, {first}",
     "Please keep this message.", "We open at {time}.", "Find us at {place}.", "A saving of {sum}.", "Thanks a lot!"))
